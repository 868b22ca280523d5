-- Drops descriptors that will never be packed, with their payloads; only those still pending.
-- KEYS[3]  matched  stream  group ARGV[2]
-- ARGV[2]  group
-- ARGV[3]  reason
-- ARGV[4]  number of records, then entry id and record id of each, from ARGV[5]
-- Reply: number dropped.
go_on_at_the_limit()
local ids = {}
for i = 0, tonumber(ARGV[4]) - 1 do
  local entry = ARGV[5 + 2 * i]
  if redis.call('XACK', KEYS[3], ARGV[2], entry) == 1 then
    redis.call('XDEL', KEYS[3], entry)
    ids[#ids + 1] = ARGV[6 + 2 * i]
  end
end
return drop_segments(table.concat(ids, ' '), ARGV[3], 'packing')
