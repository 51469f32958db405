"""Analysis of trained models: perplexity, scores, samples, causality, experts; and what training costs, in advance."""
