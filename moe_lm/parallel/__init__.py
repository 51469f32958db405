"""Training on several processes: rendezvous, communication, sharding, launch and signals."""
