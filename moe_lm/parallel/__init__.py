"""Processes: meeting, sending, starting, ending."""
