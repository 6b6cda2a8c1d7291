"""Which node to empty, so that the same replicas run on fewer.

    fleet      what the planner sees: nodes, replicas, what must stay possible
    planner    the choice, and for every node why or why not; pure
    packing    where replicas fit; pure
    guard      when a choice may be acted on; pure
    observe    a fleet made from what Ray says
    plugin     engine 1: in Serve's controller, in place of Ray's own choice
    drain      engine 2: from outside, through the drain of a node

Ray moves the replicas in both engines: the replacement first, the old replica afterwards.
"""
