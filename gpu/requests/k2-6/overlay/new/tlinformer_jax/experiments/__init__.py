"""Many runs and their results: sweeps, the record of a finished run, tables, figures and the report."""
