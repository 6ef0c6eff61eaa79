"""Web pages: `label` (people rank answers), `rate` (a person as the reward) and `chat` (models side by side), all
served by one guarded `server`."""
