-- Admits rollouts: each once, within the byte budget, all records of the call or none for lack of room.
-- KEYS[3]  segments     stream  group `matcher`
-- KEYS[4]  seen:now     set     record ids of the current generation
-- KEYS[5]  seen:before  set     record ids of the generation before it
-- ARGV[2]  byte budget of the run
-- ARGV[3]  ids a generation of `seen` holds: at least so many of the latest are recognised
-- ARGV[4]  largest body, bytes
-- ARGV[5]  number of records, then for each, from ARGV[6]:
--          record id, policy version, request id or "", info, body (msgpack)
--          info: tokens \t task \t sample id \t generated_at_ms \t purpose \t optimizer step
-- Reply: {"full", bytes in use}, or a status a record:
--   ok         admitted
--   duplicate  admitted before
--   late       its request was closed without it
--   too_large  over the largest body
--   bad_id     not 1 to 200 characters of A-Z a-z 0-9 . _ : ~ -, or info holds a line break
local num, total = tonumber(ARGV[5]), 0
for i = 0, num - 1 do total = total + #ARGV[10 + 5 * i] end
local used = tonumber(redis.call('HGET', COUNTERS, 'bytes') or '0')
if used + total > tonumber(ARGV[2]) then return {'full', used} end

local status, lines, admitted, repeated, late, bytes = {}, {}, 0, 0, 0, 0
for i = 0, num - 1 do
  local at = 6 + 5 * i
  local id, version, request, info, body = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local request_key = PREFIX .. 'request:' .. request
  if #id > 200 or not string.find(id, '^[%w._:~-]+$') or string.find(info, '\n') then
    status[i + 1] = 'bad_id'
  elseif #body > tonumber(ARGV[4]) then
    status[i + 1] = 'too_large'
  elseif redis.call('SISMEMBER', KEYS[4], id) == 1 or redis.call('SISMEMBER', KEYS[5], id) == 1 then
    status[i + 1], repeated = 'duplicate', repeated + 1
  elseif request ~= '' and redis.call('EXISTS', request_key) == 0 then
    status[i + 1], late = 'late', late + 1
  else
    redis.call('SADD', KEYS[4], id)
    redis.call('XADD', KEYS[3], '*', 'kind', 'segment', 'schema_version', '1', 'record_id', id,
      'policy_version', version, 'body', body)
    if request ~= '' then
      if redis.call('HINCRBY', request_key, 'remaining', -1) <= 0 then close_request(request) end
      count('open_records', -1)
    end
    status[i + 1], admitted, bytes = 'ok', admitted + 1, bytes + #body
    lines[admitted] = id .. '\t' .. version .. '\t' .. request .. '\t' .. info
  end
end
if admitted > 0 then emit('pushed', 'records', table.concat(lines, '\n')) end
if redis.call('SCARD', KEYS[4]) >= tonumber(ARGV[3]) then redis.call('RENAME', KEYS[4], KEYS[5]) end
count('pushed', admitted)
count('duplicates', repeated)
count('late', late)
count('bytes', bytes)
return status
