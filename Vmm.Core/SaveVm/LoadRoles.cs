using Vmm.Core.Memory;
using Vmm.Core.Wire;

namespace Vmm.Core.SaveVm;

/// <summary>The roles that an object plays in one attempt to load.</summary>
public sealed record LoadRoles
{
    /// <summary>Sections read by code.</summary>
    public ILoadState? State { get; init; }

    /// <summary>A FULL section that is declared and bound to the attempt's object.</summary>
    public IVmStateSection? VmState { get; init; }

    /// <summary>State that comes over data channels; only where <see cref="LoadContext.HasDataChannels"/> says that there are some.</summary>
    public ILoadStateBuffer? Buffers { get; init; }

    /// <summary>Pages that come over data channels.</summary>
    internal ILoadPages? Pages { get; init; }

    /// <summary>This device will acknowledge its first data (QEMU: <c>switchover_ack_needed</c>); counts only while the capability is on.</summary>
    public bool NeedsSwitchoverAck { get; init; }

    /// <summary>Says whether all of the state has come; without it an iterable is complete with its END section.</summary>
    internal ILoadComplete? Complete { get; init; }

    /// <summary>The end of the attempt.</summary>
    public ILoadCleanup? Cleanup { get; init; }

    internal bool IsEmpty => State is null && VmState is null;

    /// <summary>Collects every role that an object implements.</summary>
    /// <param name="attempt">The object.</param>
    /// <returns>The record; narrow it with <c>with</c>.</returns>
    public static LoadRoles Of(object attempt) => new()
    {
        State = attempt as ILoadState,
        VmState = attempt as IVmStateSection,
        Buffers = attempt as ILoadStateBuffer,
        Pages = attempt as ILoadPages,
        Complete = attempt as ILoadComplete,
        Cleanup = attempt as ILoadCleanup,
    };
}

/// <summary>Loading from the stream (QEMU: <c>load_state</c>).</summary>
public interface ILoadState
{
    /// <summary>Reads the body of a START, PART, END or FULL section. BQL: held for FULL sections only.</summary>
    /// <param name="f">The stream.</param>
    /// <param name="versionId">Version from the header of the START or FULL section.</param>
    void LoadState(QemuFileReader f, int versionId);
}

/// <summary>Judges whether all of a state has come, before the load is confirmed.</summary>
internal interface ILoadComplete
{
    /// <summary>Call at the end of the stream and of the data channels, before the cleanup. BQL: not held.</summary>
    /// <exception cref="Errors.VmmException">Something never came; names it.</exception>
    void ThrowIfIncomplete();
}

/// <summary>The end of an attempt, well or not (QEMU: <c>load_cleanup</c>).</summary>
public interface ILoadCleanup
{
    /// <summary>Gives back what the attempt took, also when no section ever came; must not throw. BQL: held.</summary>
    void LoadCleanup();
}

/// <summary>Loading a device's state from data channels (QEMU: <c>load_state_buffer</c>, <c>switchover_start</c>). BQL: not held unless said.</summary>
public interface ILoadStateBuffer
{
    /// <summary>
    /// Takes one buffer, in any order, possibly on several threads, perhaps before <see cref="SwitchoverStart"/>. The buffer is the callee's from
    /// here on, also when it throws.
    /// </summary>
    /// <param name="buffer">Opaque device data.</param>
    void LoadStateBuffer(StateBuffer buffer);

    /// <summary>The source has stopped its VM. BQL: held.</summary>
    void SwitchoverStart();

    /// <summary>The channels have ended: what is missing now will never come. Any thread.</summary>
    void NoMoreBuffers();

    /// <summary>Waits until all buffers are loaded, and takes the BQL for what needs it at the end. Throws what went wrong.</summary>
    /// <param name="cancel">The load is being given up.</param>
    void WaitLoaded(CancellationToken cancel);
}

/// <summary>Loading guest RAM from data channels. Any thread.</summary>
internal interface ILoadPages
{
    /// <summary>Finds a RAM block.</summary>
    /// <param name="name">From a packet.</param>
    /// <returns>The block, or null when there is none of that name.</returns>
    RamBlock? FindBlock(string name);

    /// <summary>Notes that the new content of a run of pages stands in the block.</summary>
    /// <param name="block">The block.</param>
    /// <param name="offset">Byte offset of the first page.</param>
    /// <param name="pages">Number of pages.</param>
    void NoteLoaded(RamBlock block, ulong offset, int pages);

    /// <summary>Makes a page zero.</summary>
    /// <param name="block">The block.</param>
    /// <param name="offset">Byte offset of the page.</param>
    void LoadZeroPage(RamBlock block, ulong offset);
}
