"""Fault injection, collectives of compiled programs, compiling for absent TPUs; not in the wheel."""
