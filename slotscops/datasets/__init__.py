"""What lies on disk becomes records."""
