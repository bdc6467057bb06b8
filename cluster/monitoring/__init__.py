"""Watching a cluster: Prometheus, Grafana, the live page."""
