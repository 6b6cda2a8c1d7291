"""Who holds a mount: starts servers, replaces dead ones, upgrades, unmounts. Imports little."""
