"""A Grafana dashboard, a Prometheus configuration, and a plot of the one from the other."""
