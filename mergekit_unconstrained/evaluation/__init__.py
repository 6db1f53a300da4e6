"""What a model can do, measured: tasks, scores of their examples, statistics of the scores."""
