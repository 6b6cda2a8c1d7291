"""The main job on a real model, from an S3 server to a forward pass; `weightstream demo`."""
