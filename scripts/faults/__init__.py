"""The parts of scripts/fault_campaign.py: the faults, how they get into a training, and what is checked."""
