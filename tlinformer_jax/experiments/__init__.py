"""Many runs and what they say: sweeps, the record of a finished run, tables, figures and the report."""
