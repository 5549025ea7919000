"""The server: connections, routes, who gets in, and what operators see."""
