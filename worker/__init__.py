"""The sampling engine and its queue worker."""
