"""smolora."""
