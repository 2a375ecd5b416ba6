"""MMDetection: its models made faster, or their weights brought here."""
