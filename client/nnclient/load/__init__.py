"""
A plan of load -> a report of how a server bore it.

    plan.py        what to send, how fast and how long; how it is shared among processes
    arrivals.py    when to send, in an open loop
    questions.py   what to send, and whether what comes back is right
    traffic.py     sends and receives: closed or open loop, unary or stream
    histogram.py   latencies in bounded memory
    tally.py       what was counted; adds up over processes
    worker.py      one process that makes traffic
    generator.py   starts the workers, on one common clock, and adds up
    report.py      the numbers as text and JSON
"""
