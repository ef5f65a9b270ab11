"""A federation on real hosts: certificates, node keys, SuperLink, SuperNodes and submitting.

`local` brings a whole one up on the loopback by the same steps. docs/deployment.md is the guide.
"""
