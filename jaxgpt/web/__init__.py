"""Pages in the browser: `label` (people rank answers), `chat` (models side by side), over one guarded `server`."""
