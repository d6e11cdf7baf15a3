"""The embedding network, its weights, and images to embeddings."""
