"""What a model can do: perplexities, multiple choice, greedy answers (FM 3.6)."""
