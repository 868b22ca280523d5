-- Notes how far the archive has come and trims the log behind it.
-- KEYS[3]  archive  hash  cursor
-- ARGV[2]  id of the last event that is safe on disk, with its payloads
-- ARGV[3]  events to keep for readers that look back, as far as the log's share of the budget holds them
-- ARGV[4]  cursor the archive believes is noted here; left out: whatever it is
-- ARGV[5]  1: it was looked for what the log lost up to ARGV[2]
-- Reply: {1, cursor noted now}, or {0, cursor that is noted}: another than believed, or the log no longer has the
--        event of ARGV[2], which nobody trims before it is noted; nothing is changed.
go_on_at_the_limit()
local noted = redis.call('HGET', KEYS[3], 'cursor') or '0-0'
if noted == ARGV[2] and noted ~= '0-0' then return {1, noted} end -- said again
if ARGV[4] and ARGV[4] ~= noted then return {0, noted} end
if ARGV[4] and ARGV[5] ~= '1' and ARGV[2] ~= '0-0' and #redis.call('XRANGE', EVENTS, ARGV[2], ARGV[2]) == 0 then
  return {0, noted}
end
redis.call('HSET', KEYS[3], 'cursor', ARGV[2])
trim_log(ARGV[2], tonumber(ARGV[3]))
return {1, ARGV[2]}
