using Vmm.Core.Memory;
using Vmm.Core.Wire;

namespace Vmm.Core.SaveVm;

/// <summary>
/// The roles that an object plays in one attempt to load; null means that it does not play the role. One thread makes all calls of an attempt, except those of
/// <see cref="Buffers"/>. A role that throws fails the attempt, as with <see cref="SaveRoles"/>.
/// </summary>
public sealed record LoadRoles
{
    /// <summary>Sections read by code.</summary>
    public ILoadState? State { get; init; }

    /// <summary>A FULL section that is declared and bound to the attempt's object.</summary>
    public IVmStateSection? VmState { get; init; }

    /// <summary>Takes state from data channels; null unless <see cref="LoadContext.HasDataChannels"/> is true.</summary>
    public ILoadStateBuffer? Buffers { get; init; }

    /// <summary>Takes pages from data channels.</summary>
    internal ILoadPages? Pages { get; init; }

    /// <summary>The device will acknowledge its first data (QEMU: <c>switchover_ack_needed</c>); counts only while capability switchover-ack is on.</summary>
    public bool NeedsSwitchoverAck { get; init; }

    /// <summary>The end of the attempt.</summary>
    public ILoadCleanup? Cleanup { get; init; }

    internal bool IsEmpty => State is null && VmState is null;

    /// <summary>Collects every role that an object implements; <c>with</c> removes those that do not apply in this attempt.</summary>
    public static LoadRoles Of(object attempt) => new()
    {
        State = attempt as ILoadState,
        VmState = attempt as IVmStateSection,
        Buffers = attempt as ILoadStateBuffer,
        Pages = attempt as ILoadPages,
        Cleanup = attempt as ILoadCleanup,
    };
}

/// <summary>Loading from the stream (QEMU: <c>load_state</c>).</summary>
public interface ILoadState
{
    /// <summary>
    /// Reads the body of a START, PART, END or FULL section; <paramref name="versionId"/> comes from the header of the START or FULL section.
    /// BQL: held for FULL sections only.
    /// </summary>
    /// <exception cref="Errors.VmmException">The bytes are malformed (<see cref="QemuFileReader.Bad"/>) or the device refuses them; the load fails.</exception>
    void LoadState(QemuFileReader f, int versionId);

    /// <summary>
    /// Checks that all of the state has come, so that no VM runs on half of it. Called before the confirmation and before the cleanup, when stream and data
    /// channels have ended, also when no section ever came. That every section that was begun has ended is checked elsewhere. BQL: not held.
    /// </summary>
    /// <exception cref="Errors.VmmException">Names what never came.</exception>
    void ThrowIfIncomplete()
    {
    }

    /// <summary>True when <see cref="ThrowIfIncomplete"/> says all: RAM of a background snapshot of QEMU comes whole and has no END section.</summary>
    internal bool NeedsNoEnd => false;
}

/// <summary>The end of an attempt, successful or not (QEMU: <c>load_cleanup</c>).</summary>
public interface ILoadCleanup
{
    /// <summary>Releases what the attempt took, even when no section ever came; must not throw. BQL: held.</summary>
    void LoadCleanup();
}

/// <summary>Loading a device's state from data channels (QEMU: <c>load_state_buffer</c>, <c>switchover_start</c>). BQL: not held unless said.</summary>
public interface ILoadStateBuffer
{
    /// <summary>
    /// Takes one buffer of opaque device data and owns it from then on, even when it throws. Buffers come in any order, on several threads, and perhaps
    /// before <see cref="SwitchoverStart"/>. An implementation bounds what it holds: it may wait here for room, until <see cref="LoadContext.Cancel"/> fires.
    /// </summary>
    void LoadStateBuffer(StateBuffer buffer);

    /// <summary>The source has stopped its VM. BQL: held.</summary>
    void SwitchoverStart();

    /// <summary>The channels have ended: buffers that are missing now will never come. Any thread.</summary>
    void NoMoreBuffers();

    /// <summary>
    /// Waits until all buffers are loaded, and takes the BQL for the last step if that needs it. Ends early when <paramref name="cancel"/> fires.
    /// </summary>
    /// <exception cref="Errors.VmmException">A buffer never came, or the device refused one.</exception>
    /// <exception cref="OperationCanceledException">Cancelled.</exception>
    void WaitLoaded(CancellationToken cancel);
}

/// <summary>Loading guest RAM from data channels. Any thread.</summary>
internal interface ILoadPages
{
    /// <summary>Finds the RAM block that a packet names; null when there is none of that name.</summary>
    ILoadBlock? FindBlock(string name);
}

/// <summary>One RAM block that is loaded from data channels. Any thread.</summary>
internal interface ILoadBlock
{
    /// <summary>The block.</summary>
    RamBlock Block { get; }

    /// <summary>Notes that <paramref name="pages"/> pages from byte <paramref name="offset"/> on have their new content.</summary>
    void NoteLoaded(ulong offset, int pages);

    /// <summary>Makes the page at byte <paramref name="offset"/> zero.</summary>
    void LoadZeroPage(ulong offset);
}
