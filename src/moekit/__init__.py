"""moekit: the toolkit for Mixture-of-Experts models."""
