"""Fault injection, collectives of compiled programs, TPUs that are not there; outside the wheel."""
