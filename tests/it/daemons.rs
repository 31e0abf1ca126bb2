//! Several daemons on one PostgreSQL database.
