"""How many replicas: a pure policy, the class that Serve calls with it, and a simulator."""
