"""Small applications, one of each kind: `serve run examples.plain:app`."""
