"""The commands: each defines its flags and makes one call."""
