-- Notes how far the archive has come and trims the log behind it.
-- KEYS[3]  archive  hash  cursor
-- ARGV[2]  id of the last event that is safe on disk, with its payloads
-- ARGV[3]  events to keep for readers that look back
-- ARGV[4]  cursor the archive believes is noted here; left out: whatever it is
-- Reply: {1, cursor noted now}, or {0, cursor that is noted}: another than believed, nothing is changed.
go_on_at_the_limit()
local noted = redis.call('HGET', KEYS[3], 'cursor') or '0-0'
if noted == ARGV[2] and noted ~= '0-0' then return {1, noted} end -- said again
if ARGV[4] and ARGV[4] ~= noted then return {0, noted} end
redis.call('HSET', KEYS[3], 'cursor', ARGV[2])
local surplus = redis.call('XLEN', EVENTS) - tonumber(ARGV[3])
if surplus > 0 then
  local safe = redis.call('XRANGE', EVENTS, '-', ARGV[2], 'COUNT', surplus)
  if #safe > 0 then redis.call('XTRIM', EVENTS, 'MINID', safe[#safe][1]) end
end
return {1, ARGV[2]}
