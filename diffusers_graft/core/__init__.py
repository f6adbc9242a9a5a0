"""Values that every room uses: sites, the context of a forward, files on disk."""
