"""What programs cost and devices reach: FLOPs, bytes and peaks."""
