"""The labeling page: people rank answers in a browser, one fsynced line per judgement.

`store` holds tasks and labels, `server` speaks HTTP, page.html, page.css and page.js are what the browser gets,
`agreement` says how much the labels are worth. None of it needs torch.
"""
