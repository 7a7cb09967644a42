"""The actors: one thread, one mailbox (a ROUTER) and one loop each; nothing is handed from one to another."""
