"""The dashboard: a page, its JSON and Prometheus' metrics, from the files of a home."""
