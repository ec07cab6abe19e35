"""What the server counts -> plain numbers that can be added up -> Prometheus's text, over HTTP."""
