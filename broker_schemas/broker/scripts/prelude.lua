-- Prepended to every script. Fixed places, so that each script reads the same:
-- KEYS[1]  events    stream  the log; one entry a transition, field `type` first
-- KEYS[2]  counters  hash    running sums of the log, so that nobody has to fold it to see a total
-- ARGV[1]  prefix    text    `{rollstream:<run>}:`, for the keys a script derives; where its caller holds a place, then
--                            "\n", the role, " " and its token: refused once lease:<role> has a greater one
--   raw:<record id>      string   SegmentRecord body that a producer brought: nothing is decided yet
--   body:<record id>     string   SegmentRecord body that push_segments admitted
--   made:<record id>     string   MatchedSegment body that a matcher brought
--   payload:<record id>  string   MatchedSegment body that commit_match took
--   ready:<rank>         stream   fields pack, version, ids, id, step
--   ready:<rank>:versions  zset   entries of ready:<rank>, made sortable -> lowest policy version of the pack
--   request:<id>         hash     spec, num_records, records, remaining, attempt, purpose
--   admitted             set      entry ids of `segments` that came through push_segments and are not committed
-- Lists inside an event are lines: records parted by "\n", fields by "\t", ids by " ".
local EVENTS, COUNTERS, PREFIX = KEYS[1], KEYS[2], ARGV[1]

local fence_at = string.find(PREFIX, '\n', 1, true)
if fence_at then
  local role, token = string.match(PREFIX, '\n(%l+) (%d+)$')
  PREFIX = string.sub(PREFIX, 1, fence_at - 1)
  local held = redis.call('HMGET', PREFIX .. 'lease:' .. role, 'token', 'holder')
  if held[1] and tonumber(held[1]) > tonumber(token) then
    local host, pid = string.match(held[2] or '', '"host": "([^"]*)", "pid": (%d+)')
    return redis.error_reply('FENCED the place of the ' .. role .. ' was taken by process ' .. (pid or '?') ..
      ' on ' .. (host or 'an unknown host'))
  end
end

local BYTES_AN_EVENT = 64
local function emit(kind, ...)
  local size = BYTES_AN_EVENT + #kind
  for _, text in ipairs({...}) do size = size + #tostring(text) end
  redis.call('HINCRBY', COUNTERS, 'log_bytes', size)
  return redis.call('XADD', EVENTS, '*', 'type', kind, ...)
end

-- The log may hold an eighth of the run's byte budget besides; what is more counts against it.
local LOG_SHARE = 8
-- Lets go of the oldest events, none after `upto`, while the log holds more than its share, or more than `most`.
-- At most 2,000 in one call. Returns how many.
local function trim_log(upto, most)
  local known = redis.call('HMGET', COUNTERS, 'log_bytes', 'budget')
  local held, share = tonumber(known[1] or '0'), tonumber(known[2] or '1e15') / LOG_SHARE
  local num, freed, gone = redis.call('XLEN', EVENTS), 0, 0
  for _ = 1, 20 do
    if held - freed <= share and num - gone <= most then break end
    local next_id
    for _, entry in ipairs(redis.call('XRANGE', EVENTS, '-', upto, 'COUNT', 100)) do
      if held - freed <= share and num - gone <= most then break end
      local ms, place = string.match(entry[1], '^(%d+)-(%d+)$')
      next_id = ms .. '-' .. string.format('%.0f', tonumber(place) + 1)
      freed, gone = freed + BYTES_AN_EVENT, gone + 1
      for i = 2, #entry[2] do freed = freed + #entry[2][i] end
    end
    if not next_id then break end
    redis.call('XTRIM', EVENTS, 'MINID', next_id)
  end
  if gone > 0 then redis.call('HINCRBY', COUNTERS, 'log_bytes', -math.min(freed, held)) end
  return gone
end

-- At the server's own memory limit a script is refused at its first write, unless that one can only free memory.
-- Whatever frees memory, or must not wait for it, begins with this one.
local function go_on_at_the_limit() redis.call('HDEL', COUNTERS, 'nothing') end

local function count(field, by)
  if by ~= 0 then redis.call('HINCRBY', COUNTERS, field, by) end
end

-- Bounds a log that no archive keeps; what is let go of no audit can see any more.
local function bound_unkept_log()
  if redis.call('EXISTS', PREFIX .. 'archive') == 0 then count('log_trimmed', trim_log('+', math.huge)) end
end

-- Calls `act` with pieces of a list: unpack() fails on a list of some thousands.
local function in_chunks(list, act)
  for first = 1, #list, 1000 do
    act({unpack(list, first, math.min(first + 999, #list))})
  end
end

-- Takes entries that are done off a stream. Whatever lies before the first pending one was delivered and is done
-- with, so the head goes in one cut, and only what lies behind it is looked for one by one. True of a group that
-- was made again only where all of `entries` are pending in it.
local function take_off(stream, group, entries)
  if #entries == 0 then return end
  local acknowledged = 0
  in_chunks(entries, function(chunk)
    acknowledged = acknowledged + redis.call('XACK', stream, group, unpack(chunk))
  end)
  local deleted = 0
  if acknowledged == #entries then
    local first = redis.call('XPENDING', stream, group, '-', '+', 1)[1]
    local ms, number = string.match(entries[#entries], '^(%d+)-(%d+)$')
    local cut = first and first[1] or string.format('%s-%.0f', ms, number + 1)
    deleted = redis.call('XTRIM', stream, 'MINID', '=', cut)
  end
  if deleted >= #entries then return end
  in_chunks(entries, function(chunk) redis.call('XDEL', stream, unpack(chunk)) end)
end

-- Frees the payloads of a space-parted list of ids; returns how many ids it names. Of one that another hand took
-- away nobody knows the size any more: it is let off with the mean of those held, and the last one with the rest.
local function free_payloads(ids)
  local freed, missing, payloads = 0, 0, {}
  for id in string.gmatch(ids, '%S+') do
    local key = PREFIX .. 'payload:' .. id
    local size = redis.call('STRLEN', key)
    if size == 0 then missing = missing + 1 end
    freed = freed + size
    payloads[#payloads + 1] = key
  end
  in_chunks(payloads, function(chunk) redis.call('UNLINK', unpack(chunk)) end)
  if missing > 0 then
    local held = redis.call('HMGET', COUNTERS, 'payloads', 'payload_bytes')
    local others = tonumber(held[1] or '0') - (#payloads - missing)
    local left = tonumber(held[2] or '0') - freed
    if others > 0 and left > 0 then freed = freed + math.floor(left * math.min(1, missing / others)) end
  end
  count('payloads', -#payloads)
  count('payload_bytes', -freed)
  count('bytes', -freed)
  return #payloads
end

-- Drops segments that are already matched: payload freed, event, count. Empty list: nothing.
local function drop_segments(ids, reason, stage)
  if ids == '' then return 0 end
  local num = free_payloads(ids)
  emit('dropped', 'reason', reason, 'stage', stage, 'ids', ids)
  count('dropped:' .. reason, num)
  return num
end

-- Fields of a stream entry as a table.
local function fields_of(entry)
  local fields = {}
  for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
  return fields
end

local function versions_key(rank) return PREFIX .. 'ready:' .. rank .. ':versions' end

-- An entry id as a text that sorts as entries do, and back again.
local function sortable(entry)
  local ms, number = string.match(entry, '^(%d+)-(%d+)$')
  return ms .. '-' .. string.rep('0', 12 - #number) .. number
end
local function entry_of(member) return (string.gsub(member, '-0*(%d)', '-%1')) end

local function now_ms()
  local now = redis.call('TIME')
  return now[1] * 1000 + math.floor(now[2] / 1000)
end

-- When a request that no worker has is looked for in the queue, ms from now: soon, for its job may be lost with a
-- reply, and a lease may be an hour.
local LOOK_AFTER_MS = 10000
local function look_after(lease_ms) return math.min(tonumber(lease_ms), LOOK_AFTER_MS) end

-- Where rollouts of a purpose are counted: those that evaluate take no place in the sums of training.
local function lane_of(purpose) return purpose == 'evaluation' and 'evaluation_' or '' end

local function close_request(id)
  redis.call('DEL', PREFIX .. 'request:' .. id)
  redis.call('ZREM', PREFIX .. 'requests', id)
end

-- Gives a request up: its unpushed records are accounted for as rejected. Returns how many.
local function fail_request(id, reason, detail)
  local key = PREFIX .. 'request:' .. id
  local remaining = tonumber(redis.call('HGET', key, 'remaining') or '0')
  if remaining == 0 then return 0 end
  local lane = lane_of(redis.call('HGET', key, 'purpose'))
  emit('request_failed', 'request_id', id, 'reason', reason, 'detail', detail,
    'ids', redis.call('HGET', key, 'records'))
  count(lane .. 'rejected:' .. reason, remaining)
  count(lane .. 'open_records', -remaining)
  close_request(id)
  return remaining
end
