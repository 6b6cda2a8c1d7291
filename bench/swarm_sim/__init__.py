"""The schedule of peers, driven by a model of a network: crowds past what one machine can hold.

The same pure functions that the exchange follows (`weightstream.p2p.schedule`) decide here, so that
what holds for 8 measured nodes can be asked of 10,000.
"""
