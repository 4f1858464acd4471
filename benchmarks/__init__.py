"""Speed, memory and limits, as commands; outside the wheel."""
