"""The parts of scripts/fault_campaign.py: what is started, what is done to it, and what must hold afterwards."""
