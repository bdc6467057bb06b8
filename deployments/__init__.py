"""The cloud: Ray Serve deployments that run the backbone on mixtures. No secret lives here."""
