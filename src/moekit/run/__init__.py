"""Running a model from a fraction of its memory: experts paged under a cap, caches, predictors, a server."""
