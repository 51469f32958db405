"""Analysis of trained models (perplexity, scores, samples, causality, experts) and the predicted cost of training."""
