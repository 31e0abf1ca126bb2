-- Which schedule a mark belongs to, in words; NULL: whichever is in force. Due times before a schedule was put in force are
-- nobody's to keep, also where that was while the daemon was down.
ALTER TABLE dues ADD COLUMN schedule TEXT;

-- An instance that went to another project leaves behind what was set for it in the old one. Empty: from before this was kept.
ALTER TABLE auto_scans ADD COLUMN project_id TEXT NOT NULL DEFAULT '';
