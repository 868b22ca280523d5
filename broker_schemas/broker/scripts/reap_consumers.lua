-- Forgets consumers of a group that hold nothing and were not heard of for long; a name that comes back is new.
-- KEYS[3]  the stream of the group
-- ARGV[2]  group
-- ARGV[3]  the asker's own name, which stays
-- ARGV[4]  how long unheard of, ms
-- Reply: number forgotten.
local num = 0
for _, facts in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[3], ARGV[2])) do
  local consumer = {}
  for i = 1, #facts, 2 do consumer[facts[i]] = facts[i + 1] end
  if consumer['pending'] == 0 and consumer['idle'] > tonumber(ARGV[4]) and consumer['name'] ~= ARGV[3] then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[3], ARGV[2], consumer['name'])
    num = num + 1
  end
end
return num
