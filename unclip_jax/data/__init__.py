"""What enters training: captions as tokens, stored data sets, degraded conditions."""
