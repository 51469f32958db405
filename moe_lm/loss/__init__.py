"""What training minimises: nats per word and the balance losses."""
