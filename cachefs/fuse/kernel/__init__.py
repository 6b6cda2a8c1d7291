"""The kernel driver: the FUSE protocol on /dev/fuse, from requests to answers."""
