"""Report: the HTML page and the terminal output about a run, a climb or a plan.

Reads run folders and nothing else, so a report can be made anywhere and again at any time. No torch.
"""
