"""What a trained model makes of text: perplexity, probabilities, samples, and what its predictions see."""
